"""A converted folder made public: what is sent, the model card, upload and comparison."""
