"""Everything that knows argparse, terminals and processes."""
