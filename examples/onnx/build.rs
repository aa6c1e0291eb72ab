//! Turns the ONNX files in `models/` into Burn code, which lies in Cargo's output folder.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use burn_onnx::{LoadStrategy, ModelGen};

fn main() -> io::Result<()> {
    let mut generator = ModelGen::new();
    for model in ["vit", "block", "conv"] {
        let file = format!("models/{model}.onnx");
        println!("cargo::rerun-if-changed={file}");
        generator.input(&file);
    }
    generator
        .load_strategy(LoadStrategy::Embedded)
        .out_dir("")
        .run_from_script();

    let generated = PathBuf::from(env::var_os("OUT_DIR").expect("Cargo sets OUT_DIR"));
    use_boft_linear(&generated.join("vit.rs"))?;

    // The tests compare a model with both layers.
    fs::copy(generated.join("block.rs"), generated.join("block_fast.rs"))?;
    use_boft_linear(&generated.join("block_fast.rs"))
}

/// Lets generated code use the linear layer of burn-boft, which has the fields and records of Burn's and takes the fast
/// route where it carries an adapter.
fn use_boft_linear(file: &Path) -> io::Result<()> {
    let burn = "use burn::nn::Linear;\nuse burn::nn::LinearConfig;\n";
    let boft = "use burn_boft::{BoftLinear as Linear, BoftLinearConfig as LinearConfig};\n";
    let code = fs::read_to_string(file)?;
    if !code.contains(burn) {
        let message = format!("{} does not import burn::nn::Linear", file.display());
        return Err(io::Error::other(message));
    }
    fs::write(file, code.replace(burn, boft))
}
