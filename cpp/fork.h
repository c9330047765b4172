// What the threads of a process share, in a process that is forked from it: locked by nobody there, and whole.
#pragma once

#include <pthread.h>

#include <new>

namespace safetensors_torch::layer {

// Has forks wait for the lock of State::of_process() from now on: before_fork() takes it, after_fork() lets it go, in
// the parent and, with true, in the child. Called when the library is loaded, as what of_process() returns is made
// then: of a local static that a thread is making in the moment of a fork, the child would wait for the end for ever.
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
