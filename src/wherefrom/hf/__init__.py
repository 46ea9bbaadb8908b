"""Models, texts and trainings of Hugging Face libraries, which are imported only where they are used."""
