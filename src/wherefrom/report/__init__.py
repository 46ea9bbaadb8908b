"""What a person looks at: pages and plots made from texts and scores."""
