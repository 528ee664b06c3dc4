"""What a plugin implements and what it receives; versioned as one (`plugin.API_VERSION`)."""
