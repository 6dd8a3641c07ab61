#include "parallel.h"

#include <unistd.h>

namespace attbalance {
namespace {

const pid_t loaded_by = getpid();

}  // namespace

bool forked() {
    return getpid() != loaded_by;
}

}  // namespace attbalance
