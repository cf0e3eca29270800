#pragma once
#include <nanobind/nanobind.h>

// What parallel/shared_memory.py calls.
void bind_exchange(nanobind::module_& m);
