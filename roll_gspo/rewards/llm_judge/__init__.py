"""`llm_judge`: score of a language model behind an OpenAI-compatible endpoint."""
