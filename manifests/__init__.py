"""Declarative inventories, layouts and recipes, as package data."""
