"""Operations: adapters and base weights in, adapters or weights out. One file each."""
