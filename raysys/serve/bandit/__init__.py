"""Online Matching: retrieval that learns from feedback how good each item is for each cluster of users."""
