#pragma once
#include <nanobind/nanobind.h>

// What ops/cpu/latent.py calls.
void bind_latent(nanobind::module_& m);
