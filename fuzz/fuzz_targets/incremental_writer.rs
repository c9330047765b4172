#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| safetensors_torch_fuzz::incremental_writer::run(bytes));
