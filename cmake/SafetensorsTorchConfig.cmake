# CMake package of safetensors-torch: defines the targets and finds libtorch. Used by `make install` and by the Python
# package, which has compiled libtorch layers or compiles one with the project.
#
#   find_package(SafetensorsTorch CONFIG REQUIRED)                 # C, and C++ if the project enables CXX
#   find_package(SafetensorsTorch CONFIG REQUIRED COMPONENTS c)    # C only; libtorch is not searched for
#   target_link_libraries(app PRIVATE SafetensorsTorch::safetensors_torch)
#
# Targets
#   SafetensorsTorch::c                  the C library, without libtorch
#   SafetensorsTorch::safetensors_torch  C++ (and C) over libtorch: headers, the library, torch_cpu and c10
#   SafetensorsTorch::torch_cuda         only if libtorch has it: link it too, to load to CUDA devices. Linking it
#                                        registers torch's CUDA kernels even if the program calls none of them.
#
# libtorch is the first of: the target `torch` of an earlier find_package(Torch); -DLIBTORCH=DIR; LIBTORCH in the
# environment; Torch_DIR; CMAKE_PREFIX_PATH (a libtorch directory, or torch.utils.cmake_prefix_path); for the Python
# package, the torch that is installed beside it; the system's directories. find_package(Torch) is not called: for a CUDA
# build of torch it requires the CUDA toolkit, which is not needed here.
# -DLIBTORCH_CXX11_ABI=0|1 overrides the ABI in libtorch's own CMake files.

cmake_policy(VERSION 3.18...3.31)

set(SafetensorsTorch_FOUND TRUE)
if(SafetensorsTorch_FIND_COMPONENTS)
  set(_st_components ${SafetensorsTorch_FIND_COMPONENTS})
else()
  set(_st_components c)
  get_property(_st_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  if("CXX" IN_LIST _st_languages)
    list(APPEND _st_components cpp)
  endif()
endif()
foreach(_st_component IN LISTS _st_components)
  if(NOT _st_component MATCHES "^(c|cpp)$")
    set(SafetensorsTorch_${_st_component}_FOUND FALSE)
    if(SafetensorsTorch_FIND_REQUIRED_${_st_component})
      set(SafetensorsTorch_FOUND FALSE)
      set(SafetensorsTorch_NOT_FOUND_MESSAGE "unknown component ${_st_component}; the components are c and cpp")
      return()
    endif()
  endif()
endforeach()

# Paths are relative to this file, so the package can be moved. Only the Python package contains sources to compile.
get_filename_component(_st_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." REALPATH)
set(_st_include "${_st_prefix}/include")
set(_st_shared "${_st_prefix}/lib/libsafetensors_torch.so")
set(_st_c_shared "${_st_prefix}/lib/libsafetensors_torch_c.so")
set(_st_c_static "${_st_prefix}/lib/libsafetensors_torch_c.a")
set(_st_needed "${_st_include}/safetensors_torch.h" "${_st_c_static}" "${_st_c_shared}")
set(_st_compile FALSE)
set(_st_beside "")
if(EXISTS "${CMAKE_CURRENT_LIST_DIR}/SafetensorsTorchLayer.cmake")
  set(_st_compile TRUE)
  get_filename_component(_st_beside "${CMAKE_CURRENT_LIST_DIR}/../../../../../torch" ABSOLUTE)
  list(APPEND _st_needed "${_st_prefix}/cpp/layer.cpp" "${_st_prefix}/bridge/bridge.rs.cc")
elseif(EXISTS "${_st_include}/safetensors_torch.hpp")
  list(APPEND _st_needed "${_st_shared}")
endif()
foreach(_st_file IN LISTS _st_needed)
  if(NOT EXISTS "${_st_file}")
    set(SafetensorsTorch_FOUND FALSE)
    set(SafetensorsTorch_NOT_FOUND_MESSAGE
        "the installation is incomplete: ${_st_file} is missing; install safetensors-torch again")
    return()
  endif()
endforeach()

# Names the file and the SONAME of a shared library, not the links to it, so that a project can install both.
function(_safetensors_torch_set_location target link)
  get_filename_component(file "${link}" REALPATH)
  get_filename_component(name "${link}" NAME)
  string(REGEX MATCH "^[0-9]+" major "${SafetensorsTorch_VERSION}")
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION "${file}" IMPORTED_SONAME "${name}.${major}")
endfunction()

set(SafetensorsTorch_c_FOUND TRUE)
if(NOT TARGET SafetensorsTorch::c)
  if(_st_compile)
    # Wheels contain no links, so the shared library of the Python package has no file with the name of its soname. The
    # core contains its half of the C++ bridge.
    add_library(SafetensorsTorch::c STATIC IMPORTED)
    set_target_properties(SafetensorsTorch::c PROPERTIES
      IMPORTED_LOCATION "${_st_c_static}"
      IMPORTED_LINK_INTERFACE_LANGUAGES C
      INTERFACE_LINK_LIBRARIES "stdc++;gcc_s;util;rt;pthread;m;dl")
  else()
    add_library(SafetensorsTorch::c SHARED IMPORTED)
    _safetensors_torch_set_location(SafetensorsTorch::c "${_st_c_shared}")
  endif()
  set_target_properties(SafetensorsTorch::c PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_st_include}")
endif()

if("cpp" IN_LIST _st_components)
  set(_st_problem "")
  if(NOT TARGET SafetensorsTorch::safetensors_torch OR NOT TARGET SafetensorsTorch::torch)
    include("${CMAKE_CURRENT_LIST_DIR}/SafetensorsTorchLibtorch.cmake")
    if(_st_compile)
      include("${CMAKE_CURRENT_LIST_DIR}/SafetensorsTorchLayer.cmake")
      safetensors_torch_find_libtorch("" "${_st_beside}" _st_problem)
      if(NOT _st_problem)
        safetensors_torch_add_layer("${_st_prefix}" _st_problem)
      endif()
    elseif(NOT _st_shared IN_LIST _st_needed)
      set(_st_problem "this installation contains only the C library (make install TORCH=0); for C++, install it with \
libtorch: make install PREFIX=DIR")
    else()
      safetensors_torch_find_libtorch("${_st_shared}" "" _st_problem)
      if(NOT _st_problem AND NOT TARGET SafetensorsTorch::safetensors_torch)
        add_library(SafetensorsTorch::safetensors_torch SHARED IMPORTED)
        _safetensors_torch_set_location(SafetensorsTorch::safetensors_torch "${_st_shared}")
        set_target_properties(SafetensorsTorch::safetensors_torch PROPERTIES
          INTERFACE_INCLUDE_DIRECTORIES "${_st_include}"
          INTERFACE_COMPILE_FEATURES cxx_std_17
          INTERFACE_LINK_LIBRARIES SafetensorsTorch::torch)
      endif()
    endif()
  endif()
  set(SafetensorsTorch_cpp_FOUND TRUE)
  if(_st_problem)
    set(SafetensorsTorch_cpp_FOUND FALSE)
    if(NOT SafetensorsTorch_FIND_COMPONENTS OR SafetensorsTorch_FIND_REQUIRED_cpp)
      set(SafetensorsTorch_FOUND FALSE)
      set(SafetensorsTorch_NOT_FOUND_MESSAGE
          "${_st_problem}\nFor the C library alone: find_package(SafetensorsTorch CONFIG COMPONENTS c)")
    elseif(NOT SafetensorsTorch_FIND_QUIETLY)
      message(STATUS "SafetensorsTorch: the component cpp is not available: ${_st_problem}")
    endif()
  endif()
endif()
