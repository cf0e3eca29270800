#pragma once
#include <nanobind/nanobind.h>

// What ops/cpu/recurrent.py calls.
void bind_recurrent(nanobind::module_& m);
