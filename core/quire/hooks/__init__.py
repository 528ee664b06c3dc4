"""Where plugins come in: what they may implement, how they are loaded and how one is chosen."""
