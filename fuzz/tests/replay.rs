//! Replays the corpus and the shared test vectors through every target, so that fixed findings stay fixed.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors_torch_fuzz::TARGETS;

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .expect("the directory")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

fn replay(target: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (_, run) = TARGETS.iter().find(|(name, _)| *name == target).expect("a target");
    let corpus = files(&root.join("corpus").join(target));
    let vectors = files(&root.join("../tests/vectors/malformed"));
    assert!(corpus.len() >= 8 && vectors.len() >= 150, "{} and {}", corpus.len(), vectors.len());
    for path in corpus.iter().chain(&vectors) {
        // Printed only if the test fails.
        println!("{target}: {}", path.display());
        run(&fs::read(path).expect("a file"));
    }
}

macro_rules! replays {
    ($($target:ident)*) => {
        $(
            #[test]
            fn $target() {
                replay(stringify!($target));
            }
        )*

        #[test]
        fn every_target_is_replayed_and_has_a_program() {
            let names = [$(stringify!($target)),*];
            assert!(TARGETS.iter().map(|(name, _)| *name).eq(names));
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
            let programs = files(&directory);
            assert!(programs.iter().map(|path| path.file_stem().expect("a name")).eq(names));
        }
    };
}

replays! { capi differential edit header incremental_writer index slice writer }
