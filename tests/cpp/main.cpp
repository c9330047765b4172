// Runs the tests of safetensors_torch.hpp: all, or those whose name contains the first argument.

#include "check.h"

int main(int argc, char** argv) { return check::run(argc > 1 ? argv[1] : ""); }
