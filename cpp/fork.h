// Locks of process-wide state that are unlocked, and whose state is consistent, in a forked child.
#pragma once

#include <pthread.h>

#include <new>

namespace safetensors_torch::layer {

// Makes forks wait for the lock of State::of_process(): before_fork() locks it; after_fork() unlocks it in the parent
// and, called with true, in the child. Call it when the library is loaded, which also creates the state: a child waits
// forever for a local static that another thread was initializing at the fork.
template <typename State>
bool for_all_forks() {
    const int status =
        pthread_atfork([] { State::of_process().before_fork(); }, [] { State::of_process().after_fork(false); },
                       [] { State::of_process().after_fork(true); });
    if (status != 0) {
        throw std::bad_alloc();
    }
    return true;
}

}  // namespace safetensors_torch::layer
