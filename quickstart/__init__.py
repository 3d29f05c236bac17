"""The quickstart's own steps, run by quickstart.sh: corpus and tokenizer, teacher, report."""
