//! A file that is written tensor by tensor: all are declared first, then written in any order, from any thread.
//!
//! Keeps track of the written bytes. `format::layout` places the tensors, and `atomic` replaces the target.

mod ranges;
mod state;
mod writer;

pub use writer::{IncrementalWriter, TensorWriter};
