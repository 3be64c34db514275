"""May this run start? The one answer that check, launch, resume and the ranks give."""
