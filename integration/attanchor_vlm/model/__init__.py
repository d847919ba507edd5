"""An attached model: its settings, how a call is rewritten, and what each family of models needs."""
