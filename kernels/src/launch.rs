//! A launch whose arguments are checked: tensors by device and layout, and all of them against the sizes of the
//! parameters in the compiled kernel, so a forgotten or swapped argument stops here and not on the device.
#![allow(unsafe_code)]
use crate::device::{Gpu, Kernel};
use cudarc::driver::sys;
use std::ffi::c_void;
use std::ptr;
use tch::{Kind, Tensor};

enum Arg {
    Pointer(*mut c_void),
    Int(i32),
    Float(f32),
    Map(sys::CUtensorMap),
}

impl Arg {
    /// Where the value lies, and its size.
    fn place(&self) -> (*mut c_void, usize) {
        fn of<T>(value: &T) -> (*mut c_void, usize) {
            (ptr::from_ref(value).cast_mut().cast(), size_of::<T>())
        }
        match self {
            Arg::Pointer(value) => of(value),
            Arg::Int(value) => of(value),
            Arg::Float(value) => of(value),
            Arg::Map(value) => of(value),
        }
    }
}

/// Contiguous, and where a thread may read 16 bytes at once: a gradient, for one, may lie anywhere in its bucket.
pub(crate) fn aligned(tensor: &Tensor) -> Tensor {
    let tensor = tensor.contiguous();
    if (tensor.data_ptr() as usize).is_multiple_of(16) { tensor } else { tensor.copy() }
}

/// Arguments in the order of the kernel's parameters, then `run`, on the null stream, as torch's own kernels.
pub struct Launch<'a> {
    gpu: &'a Gpu,
    kernel: &'a Kernel,
    args: Vec<Arg>,
    early: bool,
}

/// How many threads, and how much dynamic shared memory a block has.
#[derive(Clone, Copy)]
pub struct Shape {
    pub grid: [usize; 2],
    pub block: usize,
    pub shared_bytes: usize,
}

impl<'a> Launch<'a> {
    pub fn new(gpu: &'a Gpu, kernel: &'a Kernel) -> Self {
        Launch { gpu, kernel, args: Vec::new(), early: false }
    }

    /// Its blocks may take their places while the kernel before it on the stream ends. The text says `begin()` before it
    /// touches memory, and waits there.
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// A pointer to a contiguous tensor of `kind` on this GPU.
    pub fn tensor(mut self, tensor: &Tensor, kind: Kind) -> Self {
        let name = &self.kernel.name;
        assert_eq!(tensor.device(), self.gpu.device(), "{name}: argument {} is elsewhere", self.args.len());
        assert_eq!(tensor.kind(), kind, "{name}: kind of argument {}", self.args.len());
        assert!(tensor.is_contiguous(), "{name}: argument {} is not contiguous", self.args.len());
        self.args.push(Arg::Pointer(tensor.data_ptr()));
        self
    }

    /// As `tensor`, or a null pointer.
    pub fn tensor_or_null(mut self, tensor: Option<&Tensor>, kind: Kind) -> Self {
        match tensor {
            Some(tensor) => self.tensor(tensor, kind),
            None => {
                self.args.push(Arg::Pointer(ptr::null_mut()));
                self
            }
        }
    }

    pub fn int(mut self, value: i64) -> Self {
        self.args.push(Arg::Int(i32::try_from(value).expect("kernels count in 32 bits")));
        self
    }

    pub fn float(mut self, value: f32) -> Self {
        self.args.push(Arg::Float(value));
        self
    }

    /// A tensor map for the copy engine: boxes of `rows` × `cols` elements of a matrix, out of range reads as zero.
    pub fn map(mut self, matrix: &Tensor, rows: usize, cols: usize) -> Self {
        assert_eq!(matrix.device(), self.gpu.device(), "{}: argument {}", self.kernel.name, self.args.len());
        self.args.push(Arg::Map(tensor_map(matrix, rows, cols)));
        self
    }

    /// A tensor map of an E4M3 matrix, boxes of `rows` rows × 128 columns, with pairs of rows in another order: of each 8 · `pairs`
    /// rows 2 · (pairs · q + j) + e is in place 8j + 2q + e.
    pub fn map_interleaved(mut self, matrix: &Tensor, rows: usize, pairs: usize) -> Self {
        assert_eq!(matrix.device(), self.gpu.device(), "{}: argument {}", self.kernel.name, self.args.len());
        let cols = *matrix.size().last().expect("a matrix has columns");
        let ordered = matrix.view([-1, 4, pairs as i64, 2, cols]).permute([0, 2, 1, 3, 4]);
        let swizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B;
        self.args.push(Arg::Map(encode(&ordered, &[rows / (8 * pairs), pairs, 4, 2, 128], swizzle)));
        self
    }

    /// A tensor map of BF16 [B, H, S, D] of any strides but the last: swizzled boxes of `rows` positions × `cols` columns of one
    /// head, 32 or 64 of them.
    pub fn map_of_heads(mut self, heads: &Tensor, rows: usize, cols: usize) -> Self {
        use sys::CUtensorMapSwizzle::*;
        assert_eq!((heads.device(), heads.kind()), (self.gpu.device(), Kind::BFloat16), "{}: argument {}", self.kernel.name, self.args.len());
        assert!(cols == 32 || cols == 64, "{}: boxes of {cols} columns", self.kernel.name);
        let swizzle = if cols == 32 { CU_TENSOR_MAP_SWIZZLE_64B } else { CU_TENSOR_MAP_SWIZZLE_128B };
        self.args.push(Arg::Map(encode(heads, &[1, 1, rows, cols], swizzle)));
        self
    }

    /// A tensor map of FP32 matrices [E, M, N] to write through: swizzled boxes of `rows` rows × 32 columns of one matrix.
    pub fn map_of_stack(mut self, stack: &Tensor, rows: usize) -> Self {
        assert_eq!(stack.device(), self.gpu.device(), "{}: argument {}", self.kernel.name, self.args.len());
        let swizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B;
        self.args.push(Arg::Map(encode(stack, &[1, rows, 32], swizzle)));
        self
    }

    /// Puts the kernel on the stream. A refused launch is a bug of the caller's and panics.
    pub fn run(self, shape: Shape) {
        let Kernel { name, param_bytes, function, .. } = self.kernel;
        let (mut places, sizes): (Vec<*mut c_void>, Vec<usize>) = self.args.iter().map(Arg::place).unzip();
        assert_eq!(&sizes, param_bytes, "{name}: sizes of the arguments, and of the kernel's parameters");
        if shape.grid.contains(&0) {
            return;
        }
        self.gpu.bind().expect("the context outlives the process");
        let [x, y] = shape.grid.map(|n| n as u32);
        let (block, shared) = (shape.block as u32, shape.shared_bytes as u32);
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: 1,
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: ptr::null_mut(),
            attrs: &mut early,
            numAttrs: u32::from(self.early),
        };
        // SAFETY: the arguments have the kernel's count and sizes, and live until the call returns (it copies them).
        let code = unsafe { sys::cuLaunchKernelEx(&config, *function, places.as_mut_ptr(), ptr::null_mut()) };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS, "{name}: launch of {x}x{y} blocks of {block}, {shared} B shared");
    }
}

/// E4M3 boxes are 128 bytes wide and swizzled, as the matrix instructions read them; FP32 boxes lie plainly.
fn tensor_map(matrix: &Tensor, rows: usize, cols: usize) -> sys::CUtensorMap {
    use sys::CUtensorMapSwizzle::*;
    assert_eq!(matrix.dim(), 2, "a tensor map is of a matrix");
    let swizzle = match matrix.kind() {
        Kind::Float8e4m3fn => CU_TENSOR_MAP_SWIZZLE_128B,
        _ => CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    encode(matrix, &[rows, cols], swizzle)
}

/// `boxes`: as many sizes as the tensor has dimensions.
fn encode(tensor: &Tensor, boxes: &[usize], swizzle: sys::CUtensorMapSwizzle) -> sys::CUtensorMap {
    use sys::CUtensorMapDataType::*;
    let (element, kind) = match tensor.kind() {
        Kind::Float8e4m3fn => (1, CU_TENSOR_MAP_DATA_TYPE_UINT8),
        Kind::BFloat16 => (2, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
        Kind::Float => (4, CU_TENSOR_MAP_DATA_TYPE_FLOAT32),
        other => panic!("no tensor map for {other:?}"),
    };
    // The engine counts from the innermost dimension. The encoding refuses one without elements; a kernel that gets such
    // a tensor never reads it.
    let dims: Vec<u64> = tensor.size().iter().rev().map(|&n| n.max(1) as u64).collect();
    // A dimension of one has no stride of its own: torch may say anything.
    let stride = |(&n, &stride): (&u64, &i64)| if n > 1 { stride as u64 * element } else { (element * n).next_multiple_of(16) };
    let mut strides: Vec<u64> = dims.iter().zip(tensor.stride().iter().rev()).map(stride).collect();
    strides[0] = tensor.stride().last().map_or(0, |&n| n as u64 * element);
    let boxes: Vec<u32> = boxes.iter().rev().map(|&n| n as u32).collect();
    assert_eq!(dims.len(), boxes.len(), "boxes of {:?}", tensor.size());
    assert_eq!(strides[0], element, "the copy engine reads rows");
    assert!(strides[1..].iter().all(|n| n % 16 == 0), "a row of the copy engine starts on 16 bytes, not {strides:?}");
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: as many sizes, strides but one, and box sizes as dimensions; the memory lives as long as the launch's tensors.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            kind,
            dims.len() as u32,
            tensor.data_ptr(),
            dims.as_ptr(),
            strides[1..].as_ptr(),
            boxes.as_ptr(),
            [1; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS, "tensor map of {dims:?} in boxes of {boxes:?}");
    map
}
