use super::*;

#[test]
fn a_view_outside_its_slice_is_refused_by_name() {
    let data = [0.0f32; 11];
    let error = TensorView::strided("key", &data, &[2, 3], &[8, 2]).expect_err("reaches element 12");
    assert_eq!(error.argument(), Some("key"));
    assert!(error.to_string().contains("11 elements"), "{error}");
    assert!(TensorView::strided("key", &data, &[2, 3], &[6, 2]).is_ok());
}

#[test]
fn overlapping_outputs_are_refused() {
    let mut data = vec![0.0f32; 64];
    for strides in [[0, 1], [2, 1], [1, 1], [3, 0]] {
        let error = TensorViewMut::strided("out", &mut data, &[4, 3], &strides).expect_err("overlaps");
        assert!(error.to_string().contains("overlap"), "{error}");
    }
    for strides in [[3, 1], [1, 4], [7, 2], [1, 16]] {
        assert!(TensorViewMut::strided("out", &mut data, &[4, 3], &strides).is_ok(), "{strides:?}");
    }
    // A single row may have any stride.
    assert!(TensorViewMut::strided("out", &mut data, &[1, 3], &[0, 1]).is_ok());
}

#[test]
fn rows_are_loaded_and_stored_through_any_stride() -> Result<()> {
    let data: Vec<bf16> = (0..24).map(|v| bf16::from_f32(v as f32)).collect();
    let view = TensorView::strided("query", &data, &[2, 3, 4], &[1, 2, 6])?.typed::<bf16>("query")?;
    let mut row = [0.0; 4];
    view.load_row(&[1, 2], &mut row);
    assert_eq!(row, [5.0, 11.0, 17.0, 23.0]);
    let mut out = vec![0.0f32; 24];
    let mut target = TensorViewMut::strided("out", &mut out, &[2, 3, 4], &[1, 2, 6])?;
    target.typed::<f32>("out")?.store_row(&[1, 2], &row);
    assert_eq!(target.view().to_f64()[20..], [5.0, 11.0, 17.0, 23.0]);
    assert_eq!((out[5], out[11], out[17], out[23]), (5.0, 11.0, 17.0, 23.0));
    Ok(())
}

#[test]
fn a_wrong_dtype_names_both_types() {
    let data = [0i32; 4];
    let view = TensorView::new("query", &data, &[4]).expect("valid");
    let error = view.typed::<f32>("query").expect_err("i32 is not f32");
    assert_eq!(error.to_string(), "query: expected dtype f32, got dtype i32");
}

#[test]
fn an_allocation_that_cannot_be_is_an_error() {
    let error = Tensor::zeros("out", DType::F32, &[1 << 40, 1 << 20]).expect_err("too large");
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(Tensor::zeros("out", DType::F32, &[1 << 40, 1 << 40]).is_err());
}

#[test]
fn slices_keep_strides_and_bounds() -> Result<()> {
    let mut data: Vec<f32> = (0..24).map(|v| v as f32).collect();
    let view = TensorView::strided("gates", &data, &[2, 3, 4], &[1, 2, 6])?;
    assert_eq!(view.slice_axis("gates", 1, 1..3)?.to_f64()[..4], [2.0, 8.0, 14.0, 20.0]);
    assert!(view.slice_axis("gates", 1, 3..3)?.to_f64().is_empty());
    let error = view.slice_axis("gates", 1, 2..4).expect_err("beyond the axis");
    assert_eq!(error.argument(), Some("gates"));
    let mut target = TensorViewMut::new("out", &mut data, &[6, 4])?;
    target.slice_axis("out", 0, 4..6)?.typed::<f32>("out")?.fill(-1.0);
    assert!(data[16..].iter().all(|v| *v == -1.0) && data[15] == 15.0);
    Ok(())
}
