"""The example's own tests run where the example is installed: in the stranger's environment."""

collect_ignore = ["quire-example"]
