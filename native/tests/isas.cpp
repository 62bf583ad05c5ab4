// Prints the instruction sets that kernels exist for and that run here, separated by commas.

#include <cstdio>

#include "secateur.h"

int main() { std::puts(secateur_isas()); }
