"""The question board as an ordinary web application: it keeps questions in its own database and publishes them."""
