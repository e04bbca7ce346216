"""The Hub: repos, byte ranges, headers, pulling."""
