# CMake package of safetensors_torch: its two targets, and where libtorch is. Owns no build step of the library itself.
#
#   find_package(safetensors_torch CONFIG REQUIRED)                 # C, and C++ where the project has CXX enabled
#   find_package(safetensors_torch CONFIG REQUIRED COMPONENTS c)    # C alone; libtorch is not looked for
#   target_link_libraries(app PRIVATE safetensors_torch::safetensors_torch)
#
# Targets
#   safetensors_torch::c                  the C library, without libtorch
#   safetensors_torch::safetensors_torch  C++ (and C) over libtorch: headers, the library, torch_cpu and c10
#   safetensors_torch::torch_cuda         only where libtorch has it: link it too, to load to CUDA devices. A program
#                                         that links it registers torch's CUDA kernels even if it calls none of them.
#
# libtorch is, in this order: the target `torch` of an earlier find_package(Torch); -DLIBTORCH=DIR; the environment's
# LIBTORCH; Torch_DIR; CMAKE_PREFIX_PATH, where both a libtorch folder and what torch.utils.cmake_prefix_path gives will
# do; the system's folders. find_package(Torch) is not called: with a CUDA build of torch it fails where there is no CUDA
# toolkit, and none is needed here. -DLIBTORCH_CXX11_ABI=0|1 overrides the ABI that libtorch's own CMake files state.

cmake_policy(VERSION 3.18...3.31)

set(safetensors_torch_FOUND TRUE)
if(safetensors_torch_FIND_COMPONENTS)
  set(_st_components ${safetensors_torch_FIND_COMPONENTS})
else()
  set(_st_components c)
  get_property(_st_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  if("CXX" IN_LIST _st_languages)
    list(APPEND _st_components cpp)
  endif()
endif()
foreach(_st_component IN LISTS _st_components)
  if(NOT _st_component MATCHES "^(c|cpp)$")
    set(safetensors_torch_${_st_component}_FOUND FALSE)
    if(safetensors_torch_FIND_REQUIRED_${_st_component})
      set(safetensors_torch_FOUND FALSE)
      set(safetensors_torch_NOT_FOUND_MESSAGE "no component ${_st_component}: there are c and cpp")
      return()
    endif()
  endif()
endforeach()

# The installation is where this file is, so that it can be moved.
get_filename_component(_st_libdir "${CMAKE_CURRENT_LIST_DIR}/../.." REALPATH)
get_filename_component(_st_include "${_st_libdir}/../include" REALPATH)
set(_st_shared "${_st_libdir}/libsafetensors_torch.so")
set(_st_static "${_st_libdir}/libsafetensors_torch.a")
foreach(_st_file "${_st_include}/safetensors_torch.h" "${_st_shared}")
  if(NOT EXISTS "${_st_file}")
    set(safetensors_torch_FOUND FALSE)
    set(safetensors_torch_NOT_FOUND_MESSAGE "the installation is not complete: ${_st_file} is missing")
    return()
  endif()
endforeach()
file(STRINGS "${_st_shared}" _st_needs_torch REGEX "libtorch_cpu\\.so" LIMIT_COUNT 1)

# A C program cannot link a shared library that needs libtorch where there is none: it takes the static one then.
set(safetensors_torch_c_FOUND TRUE)
if(NOT TARGET safetensors_torch::c)
  if(_st_needs_torch)
    if(NOT EXISTS "${_st_static}")
      set(safetensors_torch_FOUND FALSE)
      set(safetensors_torch_NOT_FOUND_MESSAGE "the installation is not complete: ${_st_static} is missing")
      return()
    endif()
    add_library(safetensors_torch::c STATIC IMPORTED)
    set_target_properties(safetensors_torch::c PROPERTIES
      IMPORTED_LOCATION "${_st_static}"
      IMPORTED_LINK_INTERFACE_LANGUAGES C
      INTERFACE_LINK_LIBRARIES "gcc_s;util;rt;pthread;m;dl")
  else()
    add_library(safetensors_torch::c SHARED IMPORTED)
    set_target_properties(safetensors_torch::c PROPERTIES IMPORTED_LOCATION "${_st_shared}")
  endif()
  set_target_properties(safetensors_torch::c PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_st_include}")
endif()

if("cpp" IN_LIST _st_components)
  include("${CMAKE_CURRENT_LIST_DIR}/safetensors_torch-libtorch.cmake")
  if(NOT _st_needs_torch)
    set(_st_problem "this installation of safetensors_torch was built without libtorch (the cargo feature torch)")
  elseif(NOT TARGET safetensors_torch::torch)
    safetensors_torch_find_libtorch(_st_problem)
  endif()
  set(safetensors_torch_cpp_FOUND TRUE)
  if(_st_problem)
    set(safetensors_torch_cpp_FOUND FALSE)
    if(NOT safetensors_torch_FIND_COMPONENTS OR safetensors_torch_FIND_REQUIRED_cpp)
      set(safetensors_torch_FOUND FALSE)
      set(safetensors_torch_NOT_FOUND_MESSAGE
          "${_st_problem}\nFor the C library alone: find_package(safetensors_torch CONFIG COMPONENTS c)")
    endif()
    unset(_st_problem)
  elseif(NOT TARGET safetensors_torch::safetensors_torch)
    add_library(safetensors_torch::safetensors_torch SHARED IMPORTED)
    set_target_properties(safetensors_torch::safetensors_torch PROPERTIES
      IMPORTED_LOCATION "${_st_shared}"
      INTERFACE_INCLUDE_DIRECTORIES "${_st_include}"
      INTERFACE_COMPILE_FEATURES cxx_std_17
      INTERFACE_LINK_LIBRARIES safetensors_torch::torch)
  endif()
endif()
