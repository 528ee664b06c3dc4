"""Model plugins: one folder a family, each an entry point; what families share lies beside them."""
