"""What users call: classifier and detector, their answers, and what is fitted to them."""
