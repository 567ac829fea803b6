"""One file per op: the public function, its argument checks, and the registration (fake kernel, autograd) of the
torch op behind it.
"""
