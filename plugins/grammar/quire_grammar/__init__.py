"""Grammar engines that come with Quire."""
