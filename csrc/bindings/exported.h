// A plain C function that the library shows: everything else is hidden.
#pragma once
#define EXPORTED extern "C" __attribute__((visibility("default")))
