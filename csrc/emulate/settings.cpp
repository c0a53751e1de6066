// How the tests set the order of the threads and the moment at which copies land.
#include "simt.h"

extern "C" void lk_emulate_settings(unsigned seed, bool early) {
  lora_kernels_emulate::settings = {seed, early};
}
