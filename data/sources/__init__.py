"""What users have: folders, tables, texts, archives, known data sets."""
