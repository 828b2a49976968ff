//! `cargo xtask layers`: core <- cpu, cuda <- fsa <- cli, python; the oracle stands on core alone.

use crate::{Findings, output};
use serde_json::Value;
use std::path::Path;

/// Every crate of the workspace and the crates of the workspace that it may depend on.
const LAYERS: [(&str, &[&str]); 8] = [
    ("fsa-core", &[]),
    ("fsa-oracle", &["fsa-core"]),
    ("fsa-cpu", &["fsa-core"]),
    ("fsa-cuda", &["fsa-core"]),
    ("fsa", &["fsa-core", "fsa-cpu", "fsa-cuda"]),
    ("fsa-cli", &["fsa-core", "fsa-oracle", "fsa"]),
    ("fsa-python", &["fsa-core", "fsa"]),
    ("xtask", &["fsa-core"]),
];

/// Tests of these crates may hold what they compute against the oracle.
const TESTED_AGAINST_ORACLE: [&str; 5] = ["fsa-cpu", "fsa-cuda", "fsa", "fsa-cli", "fsa-python"];

/// Reads the dependencies from cargo and names every one that points the wrong way.
pub fn run(root: &Path) -> Findings {
    let text = output(root, "cargo", &["metadata", "--format-version", "1", "--no-deps", "--offline"])?;
    let metadata = serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    Ok(violations(&metadata))
}

fn violations(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let members: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = LAYERS.iter().find(|(member, _)| *member == name) else {
            found.push(format!("{name} has no layer: give it one in xtask/src/layers.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let target = dependency["name"].as_str().unwrap_or_default();
            let tests = dependency["kind"] == "dev";
            let to_oracle = tests && target == "fsa-oracle" && TESTED_AGAINST_ORACLE.contains(&name);
            if members.contains(&target) && !allowed.contains(&target) && !to_oracle {
                let kind = if tests { " (in its tests)" } else { "" };
                found.push(format!("{name} depends on {target}{kind}, may depend on: {}", list(allowed)));
            }
        }
    }
    found
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no crate of the workspace".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Value {
        let dependencies: Vec<_> =
            dependencies.iter().map(|(name, kind)| json!({ "name": name, "kind": kind })).collect();
        json!({ "name": name, "dependencies": dependencies })
    }

    fn found(packages: &[Value]) -> Vec<String> {
        violations(&json!({ "packages": packages }))
    }

    #[test]
    fn the_layers_themselves_point_one_way() {
        for (at, (name, allowed)) in LAYERS.iter().enumerate() {
            let lower: Vec<_> = LAYERS[..at].iter().map(|(name, _)| *name).collect();
            assert!(allowed.iter().all(|target| lower.contains(target)), "{name}");
        }
        let allowed = |name| LAYERS.iter().find(|(member, _)| *member == name).expect("a layer").1;
        assert!(!allowed("fsa-cpu").contains(&"fsa-cuda") && !allowed("fsa-cuda").contains(&"fsa-cpu"));
    }

    #[test]
    fn allowed_and_foreign_dependencies_pass() {
        let core = package("fsa-core", &[("half", None), ("proptest", Some("dev"))]);
        let oracle = package("fsa-oracle", &[("fsa-core", None)]);
        let cpu = package("fsa-cpu", &[("fsa-core", None), ("fsa-oracle", Some("dev"))]);
        assert_eq!(found(&[core, oracle, cpu]), Vec::<String>::new());
    }

    #[test]
    fn a_dependency_that_points_up_or_sideways_is_named() {
        let core = package("fsa-core", &[("fsa-oracle", Some("dev"))]);
        let oracle = package("fsa-oracle", &[("fsa-core", None), ("fsa-cpu", None)]);
        let cpu = package("fsa-cpu", &[("fsa-core", None), ("fsa-oracle", None)]);
        let expected = [
            "fsa-core depends on fsa-oracle (in its tests), may depend on: no crate of the workspace",
            "fsa-oracle depends on fsa-cpu, may depend on: fsa-core",
            "fsa-cpu depends on fsa-oracle, may depend on: fsa-core",
        ];
        assert_eq!(found(&[core, oracle, cpu]), expected);
    }

    #[test]
    fn a_new_crate_needs_a_layer() {
        assert_eq!(found(&[package("fsa-metal", &[])]), ["fsa-metal has no layer: give it one in xtask/src/layers.rs"]);
    }
}
