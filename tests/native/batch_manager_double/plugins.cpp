// A stand-in for the plugin library: keeps 1 / `share` of a prompt, or has run no engine yet (0).
#include <cstdint>

extern "C" {

int share = 0;

std::int64_t chunkkv_last_kept_tokens(std::int64_t length) { return share ? length / share : -1; }
}
