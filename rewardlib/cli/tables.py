"""Cells of the tables that steps print."""


def with_interval(metrics, name, digits=3):
    """ "0.512 [0.498, 0.527]" of a metric and its interval, "-" where it is undefined."""
    if metrics.get(name) is None:
        return "-"
    low, high = metrics[f"{name}_ci95"]
    return f"{metrics[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
