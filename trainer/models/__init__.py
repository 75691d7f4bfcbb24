"""Models of teacher and student: where from, their head, their tokenizer, what they seem."""
