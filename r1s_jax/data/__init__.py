"""What is asked and what was answered: questions, corpora, traces, results."""
