//! Row-major arrays of f64: what every function of the oracle computes with.

use fsa_core::{DType, Element, Result, Tensor, TensorView, bf16, f16};

/// A contiguous, row-major array.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Array {
    /// Wraps `data`.
    ///
    /// # Panics
    ///
    /// If `data` does not have as many elements as `shape` says.
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "elements of shape {shape:?}");
        Self { shape: shape.to_vec(), data }
    }

    /// Every element `value`.
    pub fn filled(shape: &[usize], value: f64) -> Self {
        Self { shape: shape.to_vec(), data: vec![value; shape.iter().product()] }
    }

    /// Every element 0.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::filled(shape, 0.0)
    }

    /// The elements of a view, widened.
    pub fn from_view(view: &TensorView<'_>) -> Self {
        Self { shape: view.shape().to_vec(), data: view.to_f64() }
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements in row-major order.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// The elements in row-major order, for writing.
    pub fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    fn offset(&self, index: &[usize]) -> usize {
        let mut offset = 0;
        for (axis, size) in self.shape.iter().enumerate() {
            let i = index.get(axis).copied().unwrap_or(0);
            assert!(i < *size, "index {index:?} of shape {:?}", self.shape);
            offset = offset * size + i;
        }
        offset
    }

    /// Element at a full index.
    pub fn at(&self, index: &[usize]) -> f64 {
        self.data[self.offset(index)]
    }

    /// Writable element at a full index.
    pub fn at_mut(&mut self, index: &[usize]) -> &mut f64 {
        let offset = self.offset(index);
        &mut self.data[offset]
    }

    fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The innermost vector at `leading`. An empty innermost axis gives an empty slice.
    pub fn row(&self, leading: &[usize]) -> &[f64] {
        let len = self.row_len();
        if len == 0 { &[] } else { &self.data[self.offset(leading)..][..len] }
    }

    /// The innermost vector at `leading`, for writing.
    pub fn row_mut(&mut self, leading: &[usize]) -> &mut [f64] {
        let len = self.row_len();
        if len == 0 {
            return &mut [];
        }
        let offset = self.offset(leading);
        &mut self.data[offset..][..len]
    }

    /// Applies `f` to every element.
    pub fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        self.data.iter_mut().for_each(|value| *value = f(*value));
        self
    }

    /// Adds `other`, which has the same shape, element by element through `add`.
    pub fn zip(mut self, other: &Array, add: impl Fn(f64, f64) -> f64) -> Self {
        assert_eq!(self.shape, other.shape, "shapes of two arrays that are combined");
        self.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a = add(*a, *b));
        self
    }

    /// Largest finite magnitude; 0 if there is none.
    pub fn magnitude(&self) -> f64 {
        self.data.iter().map(|v| v.abs()).filter(|v| v.is_finite()).fold(0.0, f64::max)
    }

    /// Rounds to `dtype`, to nearest, directly from f64.
    pub fn to_tensor(&self, argument: &str, dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F32 => Tensor::new(argument, self.convert(|v| v as f32), &self.shape),
            DType::Bf16 => Tensor::new(argument, self.convert(bf16::from_f64), &self.shape),
            DType::F16 => Tensor::new(argument, self.convert(f16::from_f64), &self.shape),
            DType::I32 => Tensor::new(argument, self.convert(|v| v as i32), &self.shape),
        }
    }

    fn convert<T: Element>(&self, to: impl Fn(f64) -> T) -> Vec<T> {
        self.data.iter().map(|v| to(*v)).collect()
    }
}

/// Rounds to `dtype` and back.
pub fn round_to(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::Bf16 => bf16::from_f64(value).to_f64(),
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::I32 => f64::from(value as i32),
    }
}

/// The innermost vector of a view at `leading`, widened, without touching the rest.
pub fn read_row(argument: &str, view: &TensorView<'_>, leading: &[usize]) -> Result<Vec<f64>> {
    fn load<T: Element>(argument: &str, view: &TensorView<'_>, leading: &[usize]) -> Result<Vec<f64>> {
        let typed = view.typed::<T>(argument)?;
        let mut row = vec![0.0f32; view.shape().last().copied().unwrap_or(0)];
        typed.load_row(leading, &mut row);
        Ok(row.into_iter().map(f64::from).collect())
    }
    match view.dtype() {
        DType::F32 => load::<f32>(argument, view, leading),
        DType::Bf16 => load::<bf16>(argument, view, leading),
        DType::F16 => load::<f16>(argument, view, leading),
        DType::I32 => load::<i32>(argument, view, leading),
    }
}
