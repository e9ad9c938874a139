"""What must not break it: cases by the thousand, each generated from its number, run where they can do no harm."""
