//! What `fsa attend` refuses: the message names the tensor or flag, and nothing is left behind.

mod common;

use common::{Folder, Run, Stored, fsa, numbers, tensor, write};
use fsa::DType;
use safetensors::Dtype;

/// 40 tokens, 4 heads on 2 of 8.
fn plain() -> Vec<(&'static str, Stored)> {
    vec![
        ("query", (&numbers(1, DType::F32, &[40, 4, 8])).into()),
        ("key", (&numbers(2, DType::F32, &[40, 2, 8])).into()),
        ("value", (&numbers(3, DType::F32, &[40, 2, 8])).into()),
        ("gates", (&numbers(4, DType::F32, &[40, 3])).into()),
    ]
}

/// `plain` with one tensor replaced or added.
fn with(name: &'static str, stored: Stored) -> Vec<(&'static str, Stored)> {
    let mut tensors = plain();
    tensors.retain(|(other, _)| *other != name);
    tensors.push((name, stored));
    tensors
}

fn without(name: &str) -> Vec<(&'static str, Stored)> {
    let mut tensors = plain();
    tensors.retain(|(other, _)| *other != name);
    tensors
}

/// Runs on a file that must be refused, over an output that must survive.
#[track_caller]
fn refused(folder: &Folder, flags: &[&str], texts: &[&str]) -> Run {
    let (input, output) = (folder.argument("in.safetensors"), folder.argument("out.safetensors"));
    std::fs::write(&output, "precious").expect("written");
    let mut arguments = vec!["attend", &input, "-o", &output];
    arguments.extend(flags);
    let run = fsa(&arguments);
    run.is_misuse(texts);
    assert_eq!(folder.names(), ["in.safetensors", "out.safetensors"]);
    assert_eq!(std::fs::read_to_string(&output).expect("readable"), "precious");
    run
}

#[track_caller]
fn refused_tensors(tensors: &[(&str, Stored)], flags: &[&str], texts: &[&str]) {
    let folder = Folder::new();
    write(&folder.path("in.safetensors"), tensors);
    refused(&folder, flags, texts);
}

#[test]
fn files_that_are_not_safetensors() {
    let folder = Folder::new();
    let whole = {
        write(&folder.path("in.safetensors"), &plain());
        std::fs::read(folder.path("in.safetensors")).expect("readable")
    };
    let contents: [(&[u8], &str); 5] = [
        (b"", "0 bytes, too few for a header"),
        (b"hello, this is a text and no tensor", "a header length of"),
        (b"\x05\0\0\0\0\0\0\0{{{{{", "a header that does not parse"),
        (&whole[..whole.len() - 8], "bytes of data where the header promises"),
        (&[&whole[..], b"more"].concat(), "bytes of data where the header promises"),
    ];
    for (content, text) in contents {
        std::fs::write(folder.path("in.safetensors"), content).expect("written");
        refused(&folder, &[], &["in.safetensors", "expected a safetensors file", text]);
    }
}

#[test]
fn files_and_folders_that_are_not_there() {
    let folder = Folder::new();
    let (input, output) = (folder.argument("in.safetensors"), folder.argument("none/out.safetensors"));
    fsa(&["attend", &input, "-o", &output]).is_misuse(&["in.safetensors", "cannot be read"]);
    write(&folder.path("in.safetensors"), &plain());
    fsa(&["attend", &input, "-o", &output]).is_misuse(&["none/out.safetensors", "cannot be written"]);
    let directory = folder.argument("");
    fsa(&["attend", &input, "-o", &directory]).is_misuse(&["a file to write", "a directory"]);
    fsa(&["attend", &input]).is_misuse(&["--output"]);
}

#[test]
fn tensors_that_are_missing() {
    for name in ["query", "key", "value"] {
        let expected = format!("{name}: expected a tensor of that name in");
        refused_tensors(&without(name), &[], &[&expected, "got "]);
    }
    refused_tensors(&without("gates"), &[], &["gates: expected a tensor of that name, or --gates C,S,W"]);
    refused_tensors(&plain(), &["--gates", "1,1,1"], &["--gates", "a file without the tensor gates"]);
    refused_tensors(&plain(), &["--backward"], &["grad_out: expected a tensor of that name"]);
    refused_tensors(&plain(), &["--stage", "selected"], &["topk_indices: expected a tensor of that name"]);
    let half = with("cu_seqlens_q", (&tensor(vec![0i32, 40], &[2])).into());
    refused_tensors(&half, &[], &["cu_seqlens_kv: expected a tensor of that name"]);
}

#[test]
fn wrong_ranks_and_shapes() {
    let flat = with("query", (&numbers(1, DType::F32, &[40, 32])).into());
    refused_tensors(&flat, &[], &["query: expected rank 3 [total_q, num_q_heads, head_dim], got shape [40, 32]"]);
    let heads = with("query", (&numbers(1, DType::F32, &[40, 3, 8])).into());
    refused_tensors(&heads, &[], &["query", "a multiple of num_kv_heads 2", "3 heads"]);
    let odd = with("key", (&numbers(2, DType::F32, &[40, 2, 16])).into());
    refused_tensors(&odd, &[], &["key: expected shape [40, 2, 8], got shape [40, 2, 16]"]);
    let gates = with("gates", (&numbers(4, DType::F32, &[40, 4])).into());
    refused_tensors(&gates, &[], &["gates: expected shape [40, 3] or [40, 4, 3], got shape [40, 4]"]);
    let weight = with("key_weight", (&numbers(5, DType::F32, &[2, 31])).into());
    refused_tensors(&weight, &[], &["key_weight: expected shape [2, 32], got shape [2, 31]"]);
    let weight = with("value_weight", (&numbers(5, DType::F32, &[32])).into());
    refused_tensors(&weight, &[], &["value_weight: expected rank 2", "rank 1"]);
    let position = with("key_position", (&numbers(5, DType::F32, &[2, 32, 8])).into());
    refused_tensors(&position, &[], &["key_position: expected key_weight of rank 3 beside it, got none"]);
    let grad = with("grad_out", (&numbers(6, DType::F32, &[40, 2, 8])).into());
    refused_tensors(&grad, &["--backward"], &["grad_out: expected shape [40, 4, 8], got shape [40, 2, 8]"]);
}

#[test]
fn wrong_dtypes() {
    let double = with("query", Stored::raw(Dtype::F64, &[40, 4, 8], vec![0; 40 * 4 * 8 * 8]));
    refused_tensors(&double, &[], &["query: expected dtype f32, bf16, f16 or i32, got dtype F64"]);
    let integer = with("query", (&tensor(vec![0i32; 40 * 4 * 8], &[40, 4, 8])).into());
    refused_tensors(&integer, &[], &["query: expected dtype f32, bf16 or f16, got dtype i32"]);
    let mixed = with("value", (&numbers(3, DType::F16, &[40, 2, 8])).into());
    refused_tensors(&mixed, &[], &["value: expected dtype f32, got dtype f16"]);
    let sums = with("cu_seqlens", (&numbers(5, DType::F32, &[2])).into());
    refused_tensors(&sums, &[], &["cu_seqlens: expected dtype i32 or i64, got dtype F32"]);
}

#[test]
fn sequences_that_do_not_fit() {
    let sums = |values: &[i32]| with("cu_seqlens", (&tensor(values.to_vec(), &[values.len()])).into());
    refused_tensors(
        &sums(&[0, 30, 20, 40]),
        &[],
        &["cu_seqlens: expected prefix sums that do not decrease, got 20 after 30"],
    );
    refused_tensors(&sums(&[1, 40]), &[], &["cu_seqlens: expected first element 0, got 1"]);
    refused_tensors(&sums(&[0, 39]), &[], &["query: expected 39 rows, the last element of cu_seqlens_q, got 40 rows"]);
    let wide = with("cu_seqlens", Stored::i64(&[2], &[0, 1 << 40]));
    refused_tensors(&wide, &[], &["cu_seqlens: expected integers of 32 bits, got 1099511627776"]);
    let square = with("cu_seqlens", (&tensor(vec![0i32, 40], &[1, 2])).into());
    refused_tensors(&square, &[], &["cu_seqlens: expected rank 1 [batch + 1], got shape [1, 2]"]);
}

#[test]
fn parameters_that_do_not_fit() {
    refused_tensors(
        &plain(),
        &["--block-size", "16", "--kernel-stride", "32"],
        &["block_size", "a multiple of kernel_stride 32"],
    );
    refused_tensors(&plain(), &["--topk", "2"], &["topk: expected at least init_blocks + local_blocks = 3"]);
    refused_tensors(&plain(), &["--gates", "1,2"], &["--gates", "3 numbers"]);
    refused_tensors(&plain(), &["--validate"], &["--validate: expected --stage selected"]);
    refused_tensors(&plain(), &["--stage", "dense", "--branches"], &["--branches: expected --stage nsa"]);
    refused_tensors(&plain(), &["--rope-theta", "-3"], &["rope.theta: expected a positive number, got -3"]);
    refused_tensors(&plain(), &["--rope-llama3", "8,1,4,8192"], &["--rope-theta"]);
    refused_tensors(&plain(), &["--softmax-scale", "inf"], &["softmax_scale: expected a finite number, got inf"]);
}

#[test]
fn indices_are_checked_when_asked_for() {
    let selected = |ids: [i32; 2]| {
        let mut all = vec![-1i32; 2 * 40 * 2];
        all[20 * 2..21 * 2].copy_from_slice(&ids);
        with("topk_indices", (&tensor(all, &[2, 40, 2])).into())
    };
    let flags = ["--stage", "selected", "--block-size", "16", "--validate"];
    refused_tensors(&selected([5, 0]), &flags, &["topk_indices", "-1 or a block id in 0..=1", "5 in row [0, 20]"]);
    refused_tensors(&selected([-7, 0]), &flags, &["topk_indices", "-7 in row [0, 20]"]);
    refused_tensors(&selected([1, 1]), &flags, &["topk_indices", "unique", "1 in row [0, 20] twice"]);
    let shape = with("topk_indices", (&tensor(vec![0i32; 40 * 2], &[1, 40, 2])).into());
    refused_tensors(&shape, &flags, &["topk_indices: expected shape [2, 40, topk], got shape [1, 40, 2]"]);
    let folder = Folder::new();
    write(&folder.path("in.safetensors"), &selected([i32::MAX, i32::MIN]));
    let (input, output) = (folder.argument("in.safetensors"), folder.argument("out.safetensors"));
    let run = fsa(&["attend", &input, "-o", &output, "--stage", "selected", "--block-size", "16"]);
    assert_eq!(run.code, 0, "{run:?}");
}
