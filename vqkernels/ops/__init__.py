"""The operations: one file each, with schema, checks, fake kernel, autograd Function and public function."""
