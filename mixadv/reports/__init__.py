"""What reports of any kind are made of: kept parts, tables, pictures."""
