"""Find and replace: capture a graph, raise its sites to ops, plan, lower, verify, report."""
