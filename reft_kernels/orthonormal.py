def orthonormalize(v, base=None): raise NotImplementedError
def reflector_base(rotation): raise NotImplementedError
