"""Episodes played by the user's own program, which calls the model through an endpoint like that of OpenAI."""
