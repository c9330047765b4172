//! Micro-benchmarks of the header: parsing with validation, and planning with encoding.
//!
//! They use neither files nor tensor data: `bench.py` measures whole files.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use safetensors_torch::{DEFAULT_ALIGNMENT, Dtype, Header, Layout, TensorSpec};

/// The number of tensors of GPT-2, of a model with many small tensors, and of more than any model has.
const COUNTS: [usize; 3] = [148, 20_000, 1_000_000];

/// The length of the field before the JSON.
const LENGTH_BYTES: usize = 8;

fn names(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("model.layers.{index}.weight")).collect()
}

fn specs(names: &[String]) -> Vec<TensorSpec<'_>> {
    names.iter().map(|name| TensorSpec { name, dtype: Dtype::F32, shape: &[8, 8] }).collect()
}

fn plan(tensors: &[TensorSpec<'_>]) -> Layout {
    Layout::plan(tensors, None, DEFAULT_ALIGNMENT).expect("the tensors are in order")
}

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("Header::parse");
    group.sample_size(10);
    for count in COUNTS {
        let names = names(count);
        let layout = plan(&specs(&names));
        let json = &layout.header()[LENGTH_BYTES..];
        group.throughput(Throughput::Elements(count as u64));
        group.bench_with_input(BenchmarkId::from_parameter(count), json, |bencher, json| {
            bencher.iter_with_large_drop(|| {
                Header::parse(black_box(json), layout.total_bytes()).expect("the header is in order")
            });
        });
    }
    group.finish();
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("Layout::plan");
    group.sample_size(10);
    for count in COUNTS {
        let names = names(count);
        let tensors = specs(&names);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_with_input(BenchmarkId::from_parameter(count), &tensors, |bencher, tensors| {
            bencher.iter_with_large_drop(|| plan(black_box(tensors)));
        });
    }
    group.finish();
}

criterion_group!(benches, parse, encode);
criterion_main!(benches);
