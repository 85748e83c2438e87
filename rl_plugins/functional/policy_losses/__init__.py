"""Policy losses per token, the importance ratios that they share, and the ways to average them."""
