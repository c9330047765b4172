// What the threads of a process share, in a process that is forked from it: locked by nobody there, and whole.
#pragma once

#include <pthread.h>

#include <new>

namespace safetensors_torch {

// Gives `shared`, which State::of_process() is about to give to everybody, and has forks wait for its lock from now on:
// before_fork() takes it, after_fork() lets it go, in the parent and, with true, in the child.
template <typename State>
State& for_all_forks(State& shared) {
    const int status =
        pthread_atfork([] { State::of_process().before_fork(); }, [] { State::of_process().after_fork(false); },
                       [] { State::of_process().after_fork(true); });
    if (status != 0) {
        throw std::bad_alloc();
    }
    return shared;
}

}  // namespace safetensors_torch
