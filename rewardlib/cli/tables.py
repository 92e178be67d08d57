"""Cells and lines of the tables that steps print."""


def with_interval(metrics: dict, name: str, digits: int = 3) -> str:
    """ "0.512 [0.498, 0.527]" of a metric and its interval, "-" where it is undefined."""
    if metrics.get(name) is None:
        return "-"
    low, high = metrics[f"{name}_ci95"]
    return f"{metrics[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_undefined(metrics: dict) -> None:
    """Say on how many prompts no ranking is defined, where there are such prompts."""
    if n_prompts := metrics["n_prompts_without_pair_accuracy"]:
        print(
            f"  ranking is undefined for {n_prompts} prompts, whose golden rewards are all equal: "
            "left out of its means"
        )
